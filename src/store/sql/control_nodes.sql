-- All nodes, with the newest primary of each that is known.
select node, dsn, registration, system_identifier, timeline from shardmq_control.node order by node
