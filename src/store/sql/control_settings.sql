-- The settings of the cluster.
select name, value from shardmq_control.setting order by name
