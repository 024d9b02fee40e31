-- Takes free partition numbers of this node for a topic.
-- $1 topic  $2 generation  $3 count  $4 topology version
select shardmq.claim_partitions($1, $2, $3, $4)
