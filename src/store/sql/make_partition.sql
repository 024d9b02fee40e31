-- Makes a partition again that this node has lost.
-- $1 partition  $2 topic  $3 id of the topic  $4 generation  $5 topology version
select shardmq.make_partition($1, $2, $3, $4, $5)
