-- Once a minute, whoever asks: forgets members that were silent for a day or have left an hour ago, and groups
-- of broadcast consumers that are gone. Where the last time was long ago by this clock it may have leapt, and
-- those who live have not all beaten since: then only the next time. One scan of each table; who is not the
-- first waits for nothing.
with turn as materialized (
    select s.swept_at > clock_timestamp() - interval '5 minutes' as steady
      from shardmq_control.sweep s
     where s.swept_at < clock_timestamp() - interval '50 seconds'
        or s.swept_at > clock_timestamp() + interval '1 minute'
       for update skip locked),
taken as (
    update shardmq_control.sweep set swept_at = clock_timestamp() where exists (select from turn)),
members as (
    delete from shardmq_control.member
     where (heartbeat_at < (select clock_timestamp() - interval '1 day')
            or left_at < (select clock_timestamp() - interval '1 hour'))
       and exists (select from turn where steady)
    returning true),
live as materialized (
    select m.topic, m.group_name from shardmq_control.member m
     where m.left_at is null and m.heartbeat_at > (select clock_timestamp() - interval '10 minutes')),
groups as (
    delete from shardmq_control.consumer_group g
     where g.broadcast and g.created_at < (select clock_timestamp() - interval '10 minutes')
       and not exists (select from live where (live.topic, live.group_name) = (g.topic, g.group_name))
       and exists (select from turn where steady)
    returning true)
select (select count(*) from members), (select count(*) from groups)
  from turn
