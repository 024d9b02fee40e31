-- Drops the table of a day below the low watermark.
-- $1 partition  $2 day
select shardmq.drop_day($1, $2)
