-- A consumer that leaves, for good. Its row stays for an hour, also where none of its heartbeats has arrived:
-- one that arrives later finds it. Primary keys.
-- $1 member  $2 topic  $3 group  $4 id of the topic
insert into shardmq_control.member as known (member, topic, group_name, host, pid, gone_at, left_at)
select $1, t.topic, $3, '', 0, clock_timestamp(), clock_timestamp()
  from shardmq_control.topic t where t.topic = $2 and t.topic_id = $4
on conflict (member) do update set gone_at = clock_timestamp(), left_at = clock_timestamp()
 where known.left_at is null
