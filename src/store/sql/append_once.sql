-- Appends the messages of a batch whose dedup keys are new and says where all are, or why not. Takes the
-- partition's lock itself. By the primary keys of sent_key, partition and refused, and those of the day
-- table.
-- $1 partition  $2 id of the topic  $3 generation  $4 day  $5 producer  $6 sequence, new for each attempt
-- $7 keys  $8 headers  $9 payloads  $10 dedup keys
select outcome, ids, day, today
  from shardmq.append_batch_once($1, $2, $3, $4, $5, $6, $7::text[], $8::jsonb[], $9::bytea[], $10::text[])
