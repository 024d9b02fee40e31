-- A group's consumers, in the order in which they joined, also those that fell silent within a day. Index
-- member_group.
-- $1 topic  $2 group
select m.member, m.host, m.pid, m.started_at,
       extract(epoch from clock_timestamp() - m.heartbeat_at)::float8, m.unreachable,
       m.gone_at is null and m.heartbeat_at > clock_timestamp() - make_interval(secs => m.lease_secs)
  from shardmq_control.member m
 where m.topic = $1 and m.group_name = $2 and m.left_at is null
 order by m.member
