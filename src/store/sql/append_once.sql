-- Appends the messages of a batch whose dedup keys are new and says where all are, or why not. Takes the
-- partition's lock itself. What is waited for later is a lock of the day table: that does not take long, so that
-- a table which somebody has locked does not hold up messages for other partitions. By the primary keys of
-- sent_key, partition and refused, and those of the day table.
-- $1 partition  $2 id of the topic  $3 generation  $4 day  $5 producer  $6 sequence, new for each attempt
-- $7 keys  $8 headers  $9 payloads  $10 dedup keys
select outcome, ids, day, today, base_id
  from (select case when held then set_config('lock_timeout', '20ms', true) end as wait
          from (select pg_advisory_xact_lock(1397247313, $1::int) is not null as held offset 0) locked
        offset 0) ready
 cross join lateral shardmq.append_batch_once(
           case when wait is not null then $1::int end, $2, $3, $4, $5, $6, $7::text[], $8::jsonb[], $9::bytea[],
           $10::text[])
