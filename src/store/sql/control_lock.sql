-- The same, locked: one change of the topology at a time.
select id, version from shardmq_control.cluster for update
