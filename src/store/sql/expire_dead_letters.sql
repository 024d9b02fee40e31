-- Drops dead letters of a partition whose time is over, up to so many. How many that were.
-- $1 partition  $2 how many at most  $3 this machine's clock
select shardmq.expire_dead_letters($1, $2, $3)
