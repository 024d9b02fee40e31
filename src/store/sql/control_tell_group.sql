-- Running consumers of a group look at their cursors at once. Alone in its transaction.
-- $1 topic  $2 group
select pg_notify('shardmq_group', $1::text || ' ' || $2::text)
