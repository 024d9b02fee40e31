-- Forgets a group with its assignment and its silent consumers, unless one of them lives. Answers whether
-- one does, and whether the group was known. Rows of consumers that have left stay until they are swept. Primary key; index member_group.
-- $1 topic  $2 group
with live as materialized (
    select m.member from shardmq_control.member m
     where m.topic = $1 and m.group_name = $2 and m.gone_at is null
       and m.heartbeat_at > clock_timestamp() - make_interval(secs => m.lease_secs)),
forgotten as (
    delete from shardmq_control.consumer_group g
     where g.topic = $1 and g.group_name = $2 and not exists (select from live)
    returning g.group_name),
members as (
    delete from shardmq_control.member m
     where m.topic = $1 and m.group_name = $2 and m.left_at is null and not exists (select from live))
select exists (select from live), exists (select from forgotten)
