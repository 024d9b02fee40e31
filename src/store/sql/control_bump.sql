-- A new version of the topology.
update shardmq_control.cluster set version = version + 1 returning version
