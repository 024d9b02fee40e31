-- Registers a node, or gives it another address.
-- $1 node  $2 dsn without password
insert into shardmq_control.node (node, dsn) values ($1, $2)
on conflict (node) do update set dsn = excluded.dsn
