-- The row that a reader read last, to be compared; no row where it is gone. Primary key.
-- $1 base_id
select count, producer, sequence, appended_at, pg_postmaster_start_time()
  from shardmq.batch_{partition}_{day}
 where base_id = $1
