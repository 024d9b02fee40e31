-- Drops a partition's tables and cursors, where it is still of this topic.
-- $1 partition  $2 id of the topic
select shardmq.delete_partition($1, $2)
