-- Takes free partition numbers of this node for a topic.
-- $1 topic  $2 id of the topic  $3 generation  $4 count  $5 topology version  $6 numbers that control has
-- given away
select shardmq.claim_partitions($1, $2, $3, $4, $5, $6)
