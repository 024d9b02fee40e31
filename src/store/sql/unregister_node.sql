-- Takes a node's identity from it, if that is still this one.
-- $1 cluster  $2 node
delete from shardmq.identity where cluster = $1 and node = $2
