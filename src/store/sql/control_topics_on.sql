-- The topics that have partitions on a node.
-- $1 node
select distinct topic from shardmq_control.partition where partition / 100 % 100 = $1 order by topic
