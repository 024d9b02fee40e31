-- The rows of a day table from the one that contains the position, without their arrays: for a table of which
-- some row can't be read. A range of the primary key.
-- $1 position  $2 rows
select base_id, count, bytes, producer, sequence, appended_at,
       null::text[], null::jsonb[], null::bytea[], pg_postmaster_start_time()
  from shardmq.batch_{partition}_{day}
 where base_id >= coalesce((select max(base_id) from shardmq.batch_{partition}_{day} where base_id <= $1), $1)
 order by base_id limit $2::int
