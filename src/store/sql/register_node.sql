-- Gives a node its identity, unless it has one already; where it is this one, the server that it is on.
-- $1 cluster  $2 node  $3 server and database, or null
insert into shardmq.identity as i (cluster, node, server) values ($1, $2, $3)
on conflict (one_row) do update set server = excluded.server
 where i.cluster = excluded.cluster and i.node = excluded.node
