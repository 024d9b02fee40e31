-- Cursors and lag of all groups in a topic's partitions on this node, by arithmetic.
-- $1 topic
select group_name, partition, acked_id, last_id, lag, oldest_at, member, leased_until
  from shardmq.lag($1)
