-- Moves the low watermark over the oldest day of a partition if its time is over.
-- $1 partition  $2 this machine's clock
select outcome, day, group_name from shardmq.expire_day($1, $2)
