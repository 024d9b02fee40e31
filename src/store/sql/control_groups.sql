-- Groups, with how many of their consumers live, how many partitions they have and on which nodes.
-- Primary key; indexes member_group and partition_topic.
-- $1 topic (null: of all)  $2 group (null: all)
select g.topic, g.group_name, g.broadcast, g.start_at,
       (select count(*) from shardmq_control.member m
         where m.topic = g.topic and m.group_name = g.group_name and m.gone_at is null
           and m.heartbeat_at > clock_timestamp() - make_interval(secs => m.lease_secs)),
       (select count(*) from shardmq_control.partition p where p.topic = g.topic),
       array(select distinct p.partition / 100 - 100 from shardmq_control.partition p
              where p.topic = g.topic)
  from shardmq_control.consumer_group g
 where ($1::text is null or g.topic = $1) and ($2::text is null or g.group_name = $2)
 order by g.topic, g.group_name
