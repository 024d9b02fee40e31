-- The cluster's id and the version of its topology.
select id, version from shardmq_control.cluster
