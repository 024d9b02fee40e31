-- A consumer that leaves.
-- $1 member
delete from shardmq_control.member where member = $1
