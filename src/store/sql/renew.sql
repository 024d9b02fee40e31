-- Renews the lease of a member and says what it owns on this node. Primary key; an update within the
-- page. The member's row is made where it is missing.
-- $1 member  $2 group  $3 lease in seconds
with renewed as (
    insert into shardmq.member as m (member, group_name, leased_until)
    values ($1, $2, shardmq.clock() + make_interval(secs => $3))
    on conflict (member) do update set leased_until = excluded.leased_until)
select c.partition, c.owner, c.epoch, c.reset_epoch
  from shardmq.cursor c
 where c.group_name = $2 and c.member = $1
