-- Appends a batch whose fate is unknown, or that the first attempt did not insert: finds it, inserts
-- it or says why not. Indexes as in append_insert, in every day table since the first attempt.
-- $1 partition  $2 id of the topic  $3 generation  $4 day  $5 day of the first attempt  $6 producer
-- $7 sequence  $8 bytes  $9 keys  $10 headers  $11 payloads
select outcome, base_id, day, today
  from shardmq.append_batch($1, $2, $3, $4, $5, $6, $7, $8, $9::text[], $10::jsonb[], $11::bytea[])
