-- A consumer's sign of life; answers with the members of its group, in order, itself among them, and
-- with the assignment's version and basis. Silent: no heartbeat for two thirds of the lease. Missing: its
-- process' session is not there, on a server that is up for longer than a lease.
-- $1 member  $2 topic  $3 group  $4 host  $5 pid  $6 lease in seconds  $7 only these partitions, or null
-- $8 nodes that it does not reach  $9 nodes to avoid  $10 session, or null
with beat as (
    insert into shardmq_control.member (member, topic, group_name, host, pid, lease_secs,
                                        only_partitions, unreachable, avoid, session)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
    on conflict (member) do update set heartbeat_at = clock_timestamp(), gone_at = null, died = false,
        unreachable = excluded.unreachable, avoid = excluded.avoid, session = excluded.session),
swept as (
    delete from shardmq_control.member where heartbeat_at < clock_timestamp() - interval '1 day'),
swept_groups as (
    delete from shardmq_control.consumer_group g
     where g.broadcast and g.created_at < clock_timestamp() - interval '10 minutes'
       and not exists (select from shardmq_control.member m
                        where m.group_name = g.group_name
                          and m.heartbeat_at > clock_timestamp() - interval '10 minutes')),
sessions as materialized (
    select application_name from pg_stat_activity
     where datname = current_database() and application_name like 'shardmq topology %'),
peer as (
    select m.member, m.only_partitions, m.unreachable, m.avoid, m.heartbeat_at,
           m.gone_at is not null as gone, m.died,
           m.heartbeat_at < clock_timestamp() - make_interval(secs => m.lease_secs * 2 / 3) as silent,
           not exists (select from sessions s where s.application_name = m.session)
               and m.session is not null
               and pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => m.lease_secs)
               as missing
      from shardmq_control.member m
     where m.topic = $2 and m.group_name = $3 and m.member <> $1
       and m.heartbeat_at > clock_timestamp() - make_interval(secs => 60 + m.lease_secs * 2)
    union all
    select $1, $7, $8, $9, clock_timestamp(), false, false, false, false)
select p.*, a.version, a.basis
  from peer p
  left join shardmq_control.assignment a on a.topic = $2 and a.group_name = $3
 order by p.member
