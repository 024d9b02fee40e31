-- Reads a day table from the row that contains the position, which comes without its arrays and
-- counts no bytes where it ends there. Bounded by rows in the innermost select (a window function
-- without that limit reads the whole tail), and over those by the running sum of bytes, at least one
-- new row. With each row comes the incarnation of the server that it was read from. A range of the
-- primary key.
-- $1 position  $2 bytes  $3 rows
select base_id, count, bytes, producer, sequence, appended_at,
       case when base_id + count - 1 > $1 then keys end,
       case when base_id + count - 1 > $1 then headers end,
       case when base_id + count - 1 > $1 then payloads end,
       pg_postmaster_start_time()
  from (select t.*, sum(case when base_id + count - 1 > $1 then bytes else 0 end)
                        over (order by base_id) as running
          from (select * from shardmq.batch_{partition}_{day}
                 where base_id >= coalesce((select max(base_id) from shardmq.batch_{partition}_{day}
                                             where base_id <= $1), $1)
                 order by base_id limit $3::int) t) w
 where running - bytes < $2::bigint or base_id + count - 1 <= $1
 order by base_id
