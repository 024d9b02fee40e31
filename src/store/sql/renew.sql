-- Renews the lease of a member, and says what it owns on this node and which server this is. Where
-- that is another than the member last saw, nothing is renewed until it has looked at its partitions.
-- Says too how long until a parked message is due in each partition, of those after $6. Primary keys and index retry_due; an
-- update within the page. The member's row is made where it is missing. A renewal that arrives after a later one,
-- or after the lease was ended, changes nothing.
-- $1 member  $2 group  $3 lease in seconds  $4 incarnation, or null  $5 session, or null  $6 a time, or null
-- $7 turn, later than that of all that this member has sent before
with server as (
    select pg_postmaster_start_time() as incarnation,
           coalesce($4::timestamptz = pg_postmaster_start_time(), true) as same),
renewed as (
    insert into shardmq.member as m (member, group_name, leased_until, lease_secs, session, turn)
    select $1, $2, shardmq.clock() + make_interval(secs => $3), $3, $5::text, $7 from server where same
    on conflict (member) do update
        set leased_until = excluded.leased_until, lease_secs = excluded.lease_secs,
            session = excluded.session, turn = excluded.turn, left_at = null
     where m.turn < excluded.turn)
select server.incarnation, server.same, c.partition, c.owner, c.epoch, c.reset_epoch,
       (select extract(epoch from min(r.due_at) - shardmq.clock())::float8 from shardmq.retry r
         where r.group_name = $2 and r.partition = c.partition
           and r.due_at > coalesce($6::timestamptz, timestamptz '-infinity')) as parked_secs
  from server left join shardmq.cursor c on c.group_name = $2 and c.member = $1
