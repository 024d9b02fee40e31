-- Drops a partition's tables and cursors.
-- $1 partition  $2 topic
select shardmq.delete_partition($1, $2)
