-- Removes a node from the index.
-- $1 node
delete from shardmq_control.node where node = $1
