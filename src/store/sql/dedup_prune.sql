-- Forgets what was applied long ago, a part at a time. Goes by the index on the time.
-- Names are whole: the user's search_path may be anything.
-- $1 age in seconds  $2 most rows
with old as materialized (
    select pg_catalog.clock_timestamp() operator(pg_catalog.-) pg_catalog.make_interval(secs => $1)
        as until)
delete from shardmq_dedup.applied a
 where a.ctid operator(pg_catalog.=) any (array(
           select o.ctid from shardmq_dedup.applied o
            where o.applied_at operator(pg_catalog.<) (select until from old)
            limit $2))
   and a.applied_at operator(pg_catalog.<) (select until from old)
