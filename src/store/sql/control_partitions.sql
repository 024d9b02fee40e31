-- A topic's partitions. Index partition_topic.
-- $1 topic
select partition, generation, state from shardmq_control.partition where topic = $1 order by 1
