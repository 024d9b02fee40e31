-- Drops dead letters of a partition whose time is over, up to so many. How many that were.
-- $1 partition  $2 how many at most
select shardmq.expire_dead_letters($1, $2)
