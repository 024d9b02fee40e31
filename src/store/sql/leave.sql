-- Ends a member's lease on this node. The row stays for an hour: a renewal that was sent before, and arrives
-- later, has an earlier turn. Primary key.
-- $1 member  $2 group  $3 turn
insert into shardmq.member as m (member, group_name, leased_until, turn, left_at)
values ($1, $2, shardmq.clock() - interval '1 day', $3, shardmq.clock())
on conflict (member) do update
    set leased_until = excluded.leased_until, turn = excluded.turn, left_at = excluded.left_at
 where m.turn < excluded.turn
