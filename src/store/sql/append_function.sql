-- One part of an append where no statement is kept prepared: takes the lock of a partition and appends
-- a batch, or says why not. Parts for different partitions are joined by "union all", with their
-- parameters numbered on, so that one commit serves all. The function is called under the lock only:
-- no outcome says that another has it. What is waited for later is a lock of a day table: 100 ms are enough.
-- $1 partition  $2 id of the topic  $3 generation  $4 day  $5 day of the first attempt  $6 producer
-- $7 sequence  $8 bytes  $9 keys  $10 headers  $11 payloads  $12 whether to wait for the lock
select done ->> 'outcome', (done ->> 'base_id')::bigint, (done ->> 'day')::int,
       (done ->> 'today')::int, partition
  from (select partition,
               case when held and set_config('lock_timeout', '100ms', true) is not null
                    then row_to_json(shardmq.append_batch($1, $2, $3, $4, $5, $6, $7, $8,
                                               $9::text[], $10::jsonb[], $11::bytea[])) end as done
          from (select $1::int as partition,
                       case when $12::bool
                            then pg_advisory_xact_lock(1397247313, $1::int) is not null
                            else pg_try_advisory_xact_lock(1397247313, $1::int) end as held
                offset 0) locked
        offset 0) appended
