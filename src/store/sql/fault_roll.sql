-- Moves a partition to the date of the node's clock. $1 partition.
select outcome from shardmq.roll($1, null)
