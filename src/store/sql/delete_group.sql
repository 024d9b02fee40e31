-- Forgets a group on this node: deleted, unknown, or live.
-- $1 topic  $2 group
select shardmq.delete_group($1, $2)
