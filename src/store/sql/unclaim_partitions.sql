-- Takes back what a creation that failed has taken on this node.
-- $1 id of the topic
select shardmq.unclaim_partitions($1)
