-- All topics, with the number of their partitions.
select t.topic, t.generation, count(p.partition), t.created_at
  from shardmq_control.topic t left join shardmq_control.partition p using (topic)
 group by t.topic order by t.topic
