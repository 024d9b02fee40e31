-- Forgets what was applied long ago, a part at a time. Goes by the index on the time.
-- $1 age in seconds  $2 most rows
with old as materialized (
    select clock_timestamp() - make_interval(secs => $1) as until)
delete from shardmq_dedup.applied a
 where a.ctid = any (array(select o.ctid from shardmq_dedup.applied o
                            where o.applied_at < (select until from old)
                            limit $2))
   and a.applied_at < (select until from old)
