-- Forgets what was applied long ago, a part at a time. Goes by the index on the time.
-- $1 age in seconds  $2 most rows
delete from shardmq_dedup.applied
 where ctid = any (array(select ctid from shardmq_dedup.applied
                          where applied_at < clock_timestamp() - make_interval(secs => $1)
                          limit $2))
