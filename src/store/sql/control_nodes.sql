-- All nodes.
select node, dsn from shardmq_control.node order by node
