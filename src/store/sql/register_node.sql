-- Gives a node its identity, unless it has one already.
-- $1 cluster  $2 node
insert into shardmq.identity (cluster, node) values ($1, $2) on conflict do nothing
