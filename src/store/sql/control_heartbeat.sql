-- A consumer's sign of life; answers with the members of its group, in order, itself among them, and
-- with the assignment's version and basis; with nothing where the topic is gone, or another one has its name by
-- now. One that arrives when its member has left changes nothing. Silent: no heartbeat for a third of the lease,
-- by this clock, which may have leapt. Long silent: for so long that its leases are over. Missing: its process'
-- session is not there, on a server that is up for longer than a lease. Primary keys; index member_group.
-- $1 member  $2 topic  $3 group  $4 host  $5 pid  $6 lease in seconds  $7 only these partitions, or null
-- $8 nodes that it does not reach  $9 nodes to avoid  $10 session, or null  $11 id of the topic
with topic as materialized (
    select t.topic from shardmq_control.topic t where t.topic = $2 and t.topic_id = $11),
beat as (
    insert into shardmq_control.member as known (member, topic, group_name, host, pid,
                                                 lease_secs, only_partitions, unreachable, avoid, session)
    select $1, topic.topic, $3, $4, $5, $6, $7, $8, $9, $10 from topic
    on conflict (member) do update set heartbeat_at = clock_timestamp(), gone_at = null, died = false,
        unreachable = excluded.unreachable, avoid = excluded.avoid, session = excluded.session
     where known.left_at is null),
sessions as materialized (
    select application_name from pg_stat_activity
     where datname = current_database() and application_name like 'shardmq topology %'),
peer as (
    select m.member, m.only_partitions, m.unreachable, m.avoid, m.heartbeat_at,
           m.gone_at is not null as gone, m.died,
           m.heartbeat_at < clock_timestamp() - make_interval(secs => m.lease_secs / 3) as silent,
           not exists (select from sessions s where s.application_name = m.session)
               and m.session is not null
               and pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => m.lease_secs)
               as missing,
           m.heartbeat_at < clock_timestamp() - make_interval(secs => 60 + m.lease_secs * 2) as long_silent,
           m.lease_secs
      from shardmq_control.member m
     where m.topic = $2 and m.group_name = $3 and m.member <> $1 and m.left_at is null
    union all
    select $1, $7, $8, $9, clock_timestamp(), false, false, false, false, false, $6)
select p.member, p.only_partitions, p.unreachable, p.avoid, p.heartbeat_at, p.gone, p.died, p.silent, p.missing,
       a.version, a.basis, p.long_silent, p.lease_secs
  from topic cross join peer p
  left join shardmq_control.assignment a on a.topic = $2 and a.group_name = $3
 where not (p.gone and p.long_silent)
 order by p.member
