-- Resolves a group's start on this node, unless somebody did: at a time, or by this node's clock.
-- $1 topic  $2 group  $3 time (null: now)  $4 id  $5 whether it is of one consumer alone
insert into shardmq.group_start (topic, group_name, start_at, start_id, broadcast, seen_at)
values ($1, $2, coalesce($3::timestamptz, shardmq.clock()), $4, $5, shardmq.clock())
on conflict do nothing
