-- Makes a copy of a node one of another cluster.
-- $1 cluster  $2 node  $3 server and database  $4 the cluster before
update shardmq.identity set cluster = $1, server = $3
 where node = $2 and cluster in ($1, $4)
returning node
