-- Which cluster's node this is. One row, or none before it was registered.
select cluster, node from shardmq.identity
