-- Moves a group's cursors in these partitions; locked ones are passed over. Primary keys.
-- $1 topic  $2 group  $3 partitions  $4 time  $5 id  $6 whether to the latest
select partition, before_id, acked_id, moved from shardmq.seek($1, $2, $3, $4, $5, $6)
