-- A consumer's sign of life; answers with all live members of its group, in order.
-- $1 member  $2 topic  $3 group  $4 host  $5 pid  $6 lease in seconds
with beat as (
    insert into shardmq_control.member (member, topic, group_name, host, pid)
    values ($1, $2, $3, $4, $5)
    on conflict (member) do update set heartbeat_at = clock_timestamp()),
swept as (
    delete from shardmq_control.member where heartbeat_at < clock_timestamp() - interval '1 day')
select member from shardmq_control.member
 where topic = $2 and group_name = $3 and heartbeat_at > clock_timestamp() - make_interval(secs => $6)
union select $1
order by 1
