-- Forgets a setting of the cluster, inside a change.
-- $1 its name
delete from shardmq_control.setting where name = $1
