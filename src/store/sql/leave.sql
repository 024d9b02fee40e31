-- Ends a member's lease on this node.
-- $1 member
delete from shardmq.member where member = $1
